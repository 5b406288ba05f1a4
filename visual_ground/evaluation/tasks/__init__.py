"""The field's evaluations, each from its official files, one file each; `registry` has their names."""
