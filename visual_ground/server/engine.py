"""The one thread that runs the language model: answers that wait together are generated together."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from visual_ground.errors import GroundingStateError
from visual_ground.generation.generate import generate_ids, with_padding
from visual_ground.generation.listener import AnswerListener
from visual_ground.generation.logits.forbidden import ForbiddenColumns
from visual_ground.generation.options import end_ids
from visual_ground.generation.retrieval_token import RetrievalSettings
from visual_ground.generation.seeing import SeenImages
from visual_ground.model import GroundedModel
from visual_ground.server.failures import busy
from visual_ground.server.jobs import Job
from visual_ground.server.sampling import RowSampling

logger = logging.getLogger(__name__)

# Seconds for which a batch waits where nobody is known to come: a moment for requests that were sent together.
MOMENT = 0.005


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine does at once.

    Args:
        max_batch: answers that are generated together.
        max_waiting: answers that may wait; more are refused.
        gather_seconds: the longest that a batch waits for requests that are being read to join it.
        timeout: seconds for one answer, waiting included.
    """

    max_batch: int = 8
    max_waiting: int = 64
    gather_seconds: float = 0.1
    timeout: float = 300.0


class Engine:
    """Generates answers in batches; each is the one that it would be alone.

    Args:
        model: the grounded model; nothing else should change it meanwhile.
        limits: how much at once.

    Attributes:
        batches: sizes of the batches so far, as count and sum.
    """

    def __init__(self, model: GroundedModel, limits: EngineLimits | None = None) -> None:
        self.model, self.limits = model, EngineLimits() if limits is None else limits
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._next: list[Job | None] = []  # Taken out of the queue, but for another adapter than the batch's.
        self._coming: set[object] = set()  # Requests that are being read; adding and discarding are atomic.
        self._closed = False
        self.batches = [0, 0]
        self._thread = threading.Thread(target=self._work, name="visual_ground engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many answers wait."""
        return self._jobs.qsize()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Return a block in which a request is read that will ask for answers; a batch that begins waits for them."""
        request = object()
        self._coming.add(request)
        try:
            yield
        finally:
            self._coming.discard(request)

    def submit(self, jobs: list[Job]) -> None:
        """Put answers into the queue, all or none.

        Raises:
            RequestFailure: the queue is full.
            GroundingStateError: the engine was closed.
        """
        if self._closed:
            raise GroundingStateError("The engine is closed; make a new one.")
        if self.waiting + len(jobs) > self.limits.max_waiting:
            raise busy(1)
        for job in jobs:
            self._jobs.put(job)

    def close(self) -> None:
        """End the thread after the batch that it is at; what waits is cancelled."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._next.pop() if self._next else self._jobs.get()) is not None:
            batch = [job for job in self._gather(first) if job.is_wanted or job.drop()]
            if not batch:
                continue
            self.batches = [self.batches[0] + 1, self.batches[1] + len(batch)]
            try:
                self._run(batch)
            except Exception:  # The server stays up whatever a batch does.
                logger.exception("a batch failed")
            for job in batch:
                job.finish("error")
        while not self._jobs.empty():
            if (left := self._jobs.get()) is not None:
                left.finish("cancelled")

    def _gather(self, first: Job) -> list[Job]:
        """Return the first job and those for the same adapter that come soon after it."""
        jobs, until = [first], time.monotonic() + self.limits.gather_seconds
        while len(jobs) < self.limits.max_batch:
            try:
                job = self._jobs.get(timeout=MOMENT)
            except queue.Empty:
                if self._coming and time.monotonic() < until:
                    continue
                break
            if job is None or job.adapter != first.adapter:
                self._next.append(job)
                break
            jobs.append(job)
        return jobs

    @torch.no_grad()
    def _run(self, jobs: list[Job]) -> None:
        model = self.model
        if jobs[0].adapter not in (None, model.active_adapter):
            model.set_adapter(str(jobs[0].adapter))
        attached = model.active
        batch = attached.processor.batch([job.prompt for job in jobs]).to(model.frozen_lm.device)
        image_tokens = attached.prompt_image_tokens(batch.get("pixel_values"))
        ends = end_ids(model.frozen_lm, attached)

        image_tokens, padding = with_padding(attached, image_tokens, {})
        sees = [job.sampling.retrieval.see_images for job in jobs]
        seen = SeenImages(model.frozen_lm, attached, image_tokens) if any(sees) else None

        def take(row: int, token: int, vector: Any) -> bool:
            goes_on = jobs[row].take(token, vector, token in ends)
            if seen is not None and sees[row] and vector is not None:
                seen.take(row, jobs[row].answer.latest)
            return goes_on

        count = 0 if image_tokens is None else len(image_tokens)
        forbidden = ForbiddenColumns(attached.processor.vocabulary, attached.config.mask_spare_columns, count)
        listener = AnswerListener(model.frozen_lm, attached, batch["attention_mask"], take, seen=seen)
        places = () if seen is None else seen.places
        samplings, decode = [job.sampling for job in jobs], attached.processor.tokenizer.decode
        rows = RowSampling(model.ret_token_id, batch["input_ids"].shape[1], samplings, places, decode)
        options = {
            **{name: None for name in ("temperature", "top_p", "top_k")},
            "do_sample": False,
            "num_beams": 1,
            # Jobs count their own tokens; those of images that are seen come on top.
            "max_new_tokens": max(job.max_tokens for job in jobs) * (1 if seen is None else 1 + self._sight(jobs)),
            "logits_processor": [forbidden, rows],
            **padding,
        }
        # Each job has its own, which `RowSampling` applies.
        settings = RetrievalSettings(max_images=None, min_new_tokens_between_rets=0)
        generate_ids(model.frozen_lm, attached, batch, image_tokens, settings, options, listener)

    def _sight(self, jobs: list[Job]) -> int:
        """Return the most tokens that the images at one `[RET]` have."""
        return self.model.config.num_visual_tokens * max(job.sampling.retrieval.images_per_ret for job in jobs)
