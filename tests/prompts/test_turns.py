"""The last turn of a chat is found in whatever way a template marks what a user says."""

import pytest

from tests.tiny import grounded
from visual_ground.prompts.turns import last_turn, user_headers

ROLES = "{{ {'user': 'w50', 'assistant': 'w51', 'system': 'w52'}[m.role] }} "
OPENING = "{% if add_generation_prompt %}w51 {% endif %}"
TEMPLATES = {
    "a header for each role": f"{{% for m in messages %}}{ROLES}{{{{ m.content }}}} w53 {{% endfor %}}{OPENING}",
    "contents are lists": f"{{% for m in messages %}}{ROLES}{{{{ m.content[0].text }}}} w53 {{% endfor %}}{OPENING}",
    "a system message of its own": (
        f"{{% if messages[0].role != 'system' %}}<s> w52 w70 w53 {{% endif %}}{{% for m in messages %}}{ROLES}"
        f"{{{{ m.content }}}} w53 {{% endfor %}}{OPENING}"
    ),
    "only users have one": (
        "{% for m in messages %}{% if m.role == 'user' %}w60 w61 {{ m.content }} w62 {% else %}{{ m.content }} </s> "
        "{% endif %}{% endfor %}"
    ),
}
TALK = [
    {"role": "user", "content": "w4 w5"},
    {"role": "assistant", "content": "w6"},
    {"role": "user", "content": "w7"},
]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_it_reads_as_if_nothing_had_been_said_before(template, bos):
    processor = grounded(bos=bos).processor
    processor.tokenizer.chat_template = template
    turn = last_turn(processor, processor.encode(TALK).ids)
    assert tuple(turn) == processor.encode(TALK[-1:]).ids
    longer = [*TALK, {"role": "assistant", "content": "w8"}, {"role": "user", "content": "w9 w10"}]
    assert tuple(last_turn(processor, processor.encode(longer).ids)) == processor.encode(longer[-1:]).ids


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_first_turn_is_the_whole_chat(template):
    processor = grounded().processor
    processor.tokenizer.chat_template = template
    assert last_turn(processor, processor.encode(TALK[:1]).ids) is None


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}{{ m.content }} {% endfor %}", "{{ raise_exception('no') }}", "w4 w5"],
    ids=["none", "no header", "refuses", "says nothing"],
)
def test_where_nothing_marks_a_user_no_turn_is_found(template):
    processor = grounded().processor
    processor.tokenizer.chat_template = template
    assert user_headers(processor.tokenizer) == ([], [])
    assert last_turn(processor, [1, 4, 5, 4, 5]) is None
