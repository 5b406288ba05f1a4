"""Whatever a chat template does with contents: each image comes out once and in its place, or an error says why not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import picture, tokenizer
from visual_ground.errors import GroundingValueError
from visual_ground.prompts.chat import render_chat
from visual_ground.prompts.types import ImagePart

LOOP = "{% for m in messages %}<<m.role>>: <<BODY>>\n{% endfor %}"
STRINGS = {
    "plain": "{{ m.content }}",
    "trimmed": "{{ m.content | trim }}",
    "escaped": "{{ m.content | e }}",
    "json": "{{ {'content': m.content} | tojson }}",
    "upper": "{{ m.content.replace('w', 'W') }}",
}
LISTS = {
    "by type": "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}",
    "images first": "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
    "first part": "{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}{{ m.content[0]['text'] }}",
    "only where a list": "{% if m.content is not string %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
}
# The system message in the last user turn, as Mistral's templates have it.
MOVED = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {% if loop.last and messages[0].role == 'system' "
    "%}{{ messages[0].content }} {% endif %}{{ m.content }}{% endif %}{% endfor %}"
)
LAST_ONLY = "{{ messages[-1].role }}: {{ messages[-1].content }}"
WRITES_LISTS = "{% if messages[0].content is not string %}{{ messages }}{% endif %}"
TWICE = "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}"


def whole(body):
    return LOOP.replace("<<m.role>>", "{{ m.role }}").replace("<<BODY>>", body)


def render(template, messages):
    return render_chat(tokenizer(template=template), messages)


def part(value):
    return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "image": value}


CONTENTS = st.lists(st.one_of(st.sampled_from(["w4", " w5\n", "<b>", '"', "w6 w7"]), st.integers(0, 2)), min_size=1)
ALL = sorted({**STRINGS, **LISTS}.items())


@pytest.mark.parametrize("body", [body for _, body in ALL], ids=[name for name, _ in ALL])
@settings(max_examples=25)
@given(st.lists(CONTENTS, min_size=1, max_size=3))
def test_images_keep_their_order_and_words_stay_in_strings_and_in_lists(body, contents):
    pictures = [picture(i) for i in range(3)]
    values = [[pictures[v] if isinstance(v, int) else v for v in content] for content in contents]
    rendered = render(whole(body), [{"role": "user", "content": list(map(part, content))} for content in values])
    wanted = [v for content in values for v in content if not isinstance(v, str)]
    assert [one.image for one in rendered if isinstance(one, ImagePart)] == wanted
    text = "".join(one for one in rendered if isinstance(one, str))
    words = "".join(v for content in values for v in content if isinstance(v, str))
    for word in ("w4", "w5", "w6"):
        assert text.lower().count(word) == words.count(word)


def test_a_message_that_the_template_moves_takes_its_image_along():
    system, user = picture(1), picture(2)
    rendered = render(MOVED, [
        {"role": "system", "content": [part("w4"), part(system)]},
        {"role": "user", "content": [part(user), part("w5")]},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ])  # fmt: skip
    assert rendered == ["user: ", ImagePart(user), "w5assistant: w6user: w4", ImagePart(system), " w7"]


@pytest.mark.parametrize(
    "template, words",
    [(LAST_ONLY, "image 1 of 2 never"), (TWICE, "image 1 of 2 2 times"), (WRITES_LISTS, "never")],
)
def test_what_a_template_does_to_images_is_said(template, words):
    messages = [{"role": "user", "content": [part(picture(i)), part("w4")]} for i in range(2)]
    with pytest.raises(GroundingValueError, match=words):
        render(template, messages)


def test_a_template_may_leave_thoughts_out():
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    messages = [
        {"role": "user", "content": [part("w4"), part(picture(1))]},
        {"role": "assistant", "content": "w5</think>w6"},
    ]
    assert [one if isinstance(one, str) else "image" for one in render(template, messages)] == ["w4", "image", "w6"]


def test_the_last_text_is_not_lost_and_an_earlier_one_not_in_silence(caplog):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "e"}]
    with pytest.raises(GroundingValueError, match="loses the text of the last message, of the role 'user'"):
        render("user: assistant:", messages)
    assert render(LAST_ONLY, messages) == ["user: e"] and "leaves out" in caplog.text
    with pytest.raises(GroundingValueError, match="refuses.*no such role"):
        render("{{ raise_exception('no such role') }}", messages)
