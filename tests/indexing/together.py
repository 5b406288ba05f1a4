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
        print(number, report.num_images, len(report.unreadable), flush=True)
    except GroundingError as error:
        print(number, type(error).__name__, error, flush=True)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
