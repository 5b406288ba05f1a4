"""The field's evaluations, each from its official files, in folders by kind; `registry` has their names."""
