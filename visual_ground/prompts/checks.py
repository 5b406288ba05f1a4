"""Whether a language model can read the ids of prompts, and whether its tokenizer is still the one that it had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.lm.base.vocabulary import VirtualVocabulary
from visual_ground.prompts.encoded import EncodedPrompt


def check_ids(
    encoded: Sequence[EncodedPrompt], tokenizer: Any, vocabulary: VirtualVocabulary, max_length: int | None
) -> None:
    """Raise GroundingValueError where ids exceed the LM's context, or are tokens without an embedding in the LM."""
    length = max((len(prompt.ids) for prompt in encoded), default=0)
    if max_length is not None and max_length < length:
        raise GroundingValueError(f"A prompt has {length} ids, and the LM's context holds {max_length}. Shorten it.")
    size, ret = vocabulary.num_rows, vocabulary.ret_token_id
    if unknown := sorted({i for prompt in encoded for i in prompt.ids if i >= size and i != ret}):
        raise GroundingValueError(
            f"The tokens {tokenizer.convert_ids_to_tokens(unknown)} have ids {unknown}, and the LM's embedding has "
            f"{size} rows. They were added to the tokenizer and not to the LM; leave them out of the prompts, or load "
            "the LM's own tokenizer."
        )


def check_tokenizer(tokenizer: Any, vocabulary: VirtualVocabulary, ret_token: str) -> None:
    """Raise GroundingStateError where tokens were added to the tokenizer whose ids are `[RET]`'s or an image's."""
    ret, first = vocabulary.ret_token_id, vocabulary.first_image_id
    if taken := sorted(token for token, i in tokenizer.get_vocab().items() if i == ret or i >= first):
        raise GroundingStateError(
            f"The tokens {taken[:10]} were added to the tokenizer after the LM was grounded, with ids that stand for "
            f"{ret_token} or an image here. Call unground(), and ground again with this tokenizer."
        )
