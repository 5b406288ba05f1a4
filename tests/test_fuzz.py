"""Whatever is in an adapter's or an index's files: it loads whole, or a GroundingError says why, and that is all.

`make fuzz` runs 2,000 cases of each kind of file; the default suite a tenth of it.
"""

import copy
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.test_model import assert_same_state, state_of
from tests.tiny import Eye, build, grounded, image_processor, picture, tokenizer
from visual_ground import GroundedModel, GroundingConfig, GroundingError, ImageIndex
from visual_ground.index.files import ENTRIES_FILE, TABLE_FILE, VECTORS_FILE
from visual_ground.storage.tensors import CONFIG_FILE, WEIGHTS_FILE

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(
        [0, 1, -1, 2, 7, 65536, 10**9, 2**63, 10**400, 1e308, -0.0, "", "embedding", "none", "{image}", "[RET]"]
    ),
    st.sampled_from(["w4", "../../x", "/etc/passwd", "a\0b", "\ud800", "http://127.0.0.1:9/x.png", "-1", "NaN", "F64"]),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner))


def places_in(value, path=()):
    """Yield the path of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield from places_in(inner, (*path, key))


@st.composite
def changed_json(draw, original):
    """A JSON text in which a few values are others, gone, doubled, or new."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places_in(value))))
        if not path:
            value = draw(VALUES) if draw(st.integers(0, 9)) == 0 else value
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        act = draw(st.sampled_from(["other", "gone", "new"]))
        if act == "other":
            holder[path[-1]] = draw(VALUES)
        elif act == "gone":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(VALUES)
        else:
            holder.insert(path[-1], draw(VALUES))
    return json.dumps(value).encode()


@st.composite
def changed_bytes(draw, original):
    """Bytes that were flipped, cut, doubled, put in or written over."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        act = draw(st.sampled_from(["flip", "cut", "drop", "put", "deep"]))
        if act == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif act == "cut":
            del data[at:]
        elif act == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif act == "put":
            data[at:at] = draw(st.binary(max_size=16))
        elif act == "deep":
            data[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * 5000
    return bytes(data)


@st.composite
def changed_tensors(draw, original):
    """A safetensors file whose header says something else."""
    size = struct.unpack("<Q", original[:8])[0]
    header, data = json.loads(original[8 : 8 + size]), original[8 + size :]
    text = draw(changed_json(header))
    claimed = draw(st.sampled_from([len(text)] * 8 + [0, 2**40, 2**64 - 1]))
    return struct.pack("<Q", claimed) + text + draw(st.sampled_from([data, data[:-1], data + b"x", data[::-1]]))


@st.composite
def changed(draw, files):
    """A set of files of which one is changed, missing or empty."""
    name = draw(st.sampled_from(sorted(files)))
    ways = [changed_bytes(files[name]), st.sampled_from([None, b"", b"{}", b"null"])]
    if name.endswith(".json"):
        ways += [changed_json(json.loads(files[name]))] * 3
    elif name.endswith(".safetensors"):
        ways += [changed_tensors(files[name])] * 2
    return {**files, name: draw(st.one_of(ways))}


def saved_files(save, names):
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {name: Path(folder, name).read_bytes() for name in names}


ADAPTER = saved_files(grounded("llama_untied", text_layers=(-1, 1)).save_pretrained, (CONFIG_FILE, WEIGHTS_FILE))
INDEX = saved_files(
    ImageIndex(torch.eye(3), ["a", "b", 3], [picture(0), "x.png", "http://127.0.0.1:9/x.png"], [{"m": 1}] * 3)
    .save_pretrained,
    (ENTRIES_FILE, VECTORS_FILE, TABLE_FILE),
)  # fmt: skip
LM, EYE, WORDS = build("llama_untied"), Eye(), tokenizer()
LM(torch.tensor([[4, 5]]), output_hidden_states=True)  # transformers leaves hooks of its own at the first of these
BEFORE = state_of(LM)


def written(files):
    folder = tempfile.mkdtemp()
    for name, data in files.items():
        if data is not None:
            Path(folder, name).write_bytes(data)
    return folder


def load_adapter(files):
    """Load an adapter and use it, or raise a GroundingError; the LM comes out as it went in."""
    folder = written(files)
    try:
        GroundingConfig.from_pretrained(folder)
        model = GroundedModel.from_pretrained(LM, folder, EYE, WORDS, image_processor)
        try:
            model.embed_text(["w4 w5"])
            model.generate([["w4", picture(0)]], max_new_tokens=2, do_sample=False)
            with tempfile.TemporaryDirectory() as again:
                model.save_pretrained(again)
                one, two = load(files[WEIGHTS_FILE]), load(Path(again, WEIGHTS_FILE).read_bytes())
                assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        finally:
            model.unground()
        return True
    except GroundingError as error:
        assert str(error)
        return False
    finally:
        shutil.rmtree(folder)
        assert_same_state(BEFORE, state_of(LM))


def load_index(files):
    folder = written(files)
    try:
        index = ImageIndex.from_pretrained(folder)
        for i in range(len(index)):
            assert not isinstance(index.entry(i)[1], str) or Path(index.entry(i)[1]).is_relative_to(folder)
        if len(index):
            index.search(index.vectors[:1], 2)
        return True
    except GroundingError as error:
        assert str(error)
        return False
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["has_images", "has_metadata"])
@pytest.mark.parametrize("value", ["null", "0", '""', "{}"])
def test_what_is_false_is_no_boolean(name, value):
    about = {**json.loads(INDEX["index.json"]), name: json.loads(value)}
    assert not load_index({**INDEX, "index.json": json.dumps(about).encode()})


CALM = {"database": None, "suppress_health_check": list(HealthCheck)}


def test_the_files_load_as_they_are():
    assert load_adapter(ADAPTER) and load_index(INDEX)


@settings(max_examples=150, **CALM)
@given(changed(ADAPTER))
def test_an_adapter_loads_whole_or_is_refused(files):
    load_adapter(files)


@settings(max_examples=50, **CALM)
@given(changed(INDEX))
def test_an_index_loads_whole_or_is_refused(files):
    load_index(files)


@pytest.mark.fuzz
@settings(max_examples=2000, **CALM)
@given(changed(ADAPTER))
def test_two_thousand_adapters(files):
    load_adapter(files)


@pytest.mark.fuzz
@settings(max_examples=2000, **CALM)
@given(changed(INDEX))
def test_two_thousand_indexes(files):
    load_index(files)


@pytest.mark.parametrize("key, bomb", [("num_visual_tokens", 65536), ("retrieval_dim", 65536)])
def test_a_size_bomb_is_refused_before_anything_is_allocated(key, bomb, monkeypatch):
    values = json.loads(ADAPTER[CONFIG_FILE])
    values["config"][key] = bomb
    folder = written({**ADAPTER, CONFIG_FILE: json.dumps(values).encode()})
    # The reader is what makes an adapter that is not on the meta device.
    monkeypatch.setattr("visual_ground.adapter.attached.new_adapter", None)
    with pytest.raises(GroundingError, match=f"this model needs .*{bomb}|this model needs .*{bomb * 32}"):
        GroundedModel.from_pretrained(LM, folder, EYE, WORDS, image_processor)
    shutil.rmtree(folder)


def test_wrong_files_name_what_is_wrong():
    tensors = load(ADAPTER[WEIGHTS_FILE])
    values = json.loads(ADAPTER[CONFIG_FILE])
    for change, words in [
        ({"logit_scale": tensors["logit_scale"].double()}, "logit_scale: the file has .* of F64"),
        ({"ret_input": torch.full_like(tensors["ret_input"], torch.nan)}, "ret_input.* not finite"),
        ({"more": torch.zeros(1)}, "unexpected: more"),
        ({"ret_output": None}, "missing: ret_output"),
    ]:
        new = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        shapes = {name: list(tensor.shape) for name, tensor in new.items()}
        folder = written({CONFIG_FILE: json.dumps({**values, "shapes": shapes}).encode(), WEIGHTS_FILE: save(new)})
        with pytest.raises(GroundingError, match=words):
            GroundedModel.from_pretrained(LM, folder, EYE, WORDS, image_processor)
        shutil.rmtree(folder)
    folder = written({CONFIG_FILE: ADAPTER[CONFIG_FILE], WEIGHTS_FILE: save({"a": torch.zeros(1)})})
    with pytest.raises(GroundingError, match="not of one adapter"):
        GroundedModel.from_pretrained(LM, folder, EYE, WORDS, image_processor)
    shutil.rmtree(folder)
