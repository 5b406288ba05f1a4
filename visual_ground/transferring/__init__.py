"""An adapter moves to another language model.

Not named `transfer`, which is the function `visual_ground.transfer`: a folder of that name would hide it."""
