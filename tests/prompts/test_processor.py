import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from visual_ground import GroundingConfig
from visual_ground.errors import GroundingError
from visual_ground.lm.base.vocabulary import VirtualVocabulary
from visual_ground.prompts.encoded import EncodedPrompt, pad_batch
from visual_ground.prompts.processor import GroundingProcessor

PICTURE = Image.new("RGB", (4, 4))
WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", ":", "user"])}


VOCABULARY = VirtualVocabulary(num_rows=50, num_columns=50, num_tokens=50)


def make(bos=True, template=None, k=2, **settings):
    backend = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=template)
    return GroundingProcessor(tokenizer, GroundingConfig(num_visual_tokens=k, **settings), VOCABULARY, list)


def test_text_is_what_the_tokenizer_makes_of_it():
    for bos in (True, False):
        encoder = make(bos)
        assert list(encoder.encode("a b").ids) == encoder.tokenizer("a b")["input_ids"]


def test_interleaving_keeps_order_and_ret():
    encoded = make().encode(["a", PICTURE, "", PICTURE, "b[RET]c"])
    assert encoded.ids == (1, 4, -1, -1, -2, -2, 5, 50, 6) and len(encoded.images) == 2
    assert make(bos=False).encode(PICTURE).ids == (-1, -1)


def test_a_path_is_an_image_only_where_the_file_is(tmp_path):
    PICTURE.save(tmp_path / "x.png")
    assert len(make().encode(str(tmp_path / "x.png")).images) == 1
    assert len(make().encode("What is missing.png").images) == 0


def test_chat_goes_through_the_template():
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}c{% endif %}"
    )
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": " a"}]
    encoded = make(template=template).encode([{"role": "user", "content": content}])
    assert encoded.ids == (8, 7, -1, -1, 3)
    assert len(encoded.images) == 1
    with pytest.raises(GroundingError, match="chat template"):
        make().encode([{"role": "user", "content": content}])


def test_batches_pad_and_number_images_over_the_batch():
    prompts = [EncodedPrompt((-1, -1), (PICTURE,)), EncodedPrompt((4, -1, -1, -2, -2), (PICTURE, PICTURE))]
    ids, mask = pad_batch(prompts, 100, 0, "left")
    assert ids.tolist() == [[0, 0, 0, 100, 101], [4, 102, 103, 104, 105]]
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert pad_batch(prompts, 100, 0, "right")[0][0].tolist() == [100, 101, 0, 0, 0]


@pytest.mark.parametrize(("bad", "words"), [("", "empty"), ([3], "int"), ([], "empty")])
def test_bad_prompts_say_what_came(bad, words):
    with pytest.raises(GroundingError, match=words):
        make(bos=False).encode(bad)
    with pytest.raises(GroundingError, match="empty"):
        pad_batch([], 100, 0, "left")
