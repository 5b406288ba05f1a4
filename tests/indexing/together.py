"""Builds an index in as many processes as there are: `accelerate launch ... -m tests.indexing.together SOURCE FOLDER`.

With a third word, the processes whose numbers it has are killed at their second part, or fail where it starts with
"fail".
"""

import os
import signal
import sys

import torch
from accelerate import PartialState

from tests.tiny import grounded
from visual_ground.errors import GroundingError, GroundingValueError
from visual_ground.indexing import build

OPTIONS = build.BuildOptions(batch_size=2, part_size=4, thumbnail_size=4, progress=False)


def say(line):
    # All processes write into one pipe, and `print` writes each word apart where Python does not buffer, as here.
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def main(source, folder, ends=""):
    torch.set_num_threads(1)
    number, original, calls = os.environ["RANK"], build.write_part, []

    def write_part(*arguments):
        calls.append(1)
        if number in ends and len(calls) == 2:
            if ends.startswith("fail"):
                raise GroundingValueError("no more")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    build.write_part = write_part
    try:
        report = build.build_index(grounded("llama_untied").eval(), source, folder, OPTIONS)
        say(f"{number} {report.num_images} {len(report.unreadable)}")
    except GroundingError as error:
        say(f"{number} {type(error).__name__} {error}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
