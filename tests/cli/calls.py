"""A call of each command, read from its parser, so that a new command needs none written here."""

import argparse

from visual_ground.cli.main import COMMANDS


def required(parser):
    """Return the fewest arguments that a parser takes; of actions, the first."""
    words = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            name, below = next(iter(action.choices.items()))
            words += [name, *required(below)]
        elif action.required:
            words += [*action.option_strings[:1], "me/it"]
    return words


def calls():
    """Return a call for each command with which it comes as far as its `run`."""
    commands = argparse.ArgumentParser().add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    return [[name, *required(parser)] for name, parser in commands.choices.items()]
