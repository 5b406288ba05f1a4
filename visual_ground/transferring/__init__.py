"""An adapter moves to another language model.

The folder is not named `transfer` because that is the function `visual_ground.transfer`: Python would put the
subpackage in the function's place as soon as anything imports it.
"""
