"""A page to talk to a grounded model with, in a browser."""
