"""Retrieval prompts: what stands between what was said and the place where the state is read."""

PROMPTS = {
    "none": "",
    "word": 'In one word:"',
    "shows1": 'The picture shows, in one word:"',
    "shows1s": 'The picture shows, in one word: "',
    "shows": "This picture shows",
    "showsa": "The picture shows a",
    "of": "Image of",
    "keys": "Keywords:",
    "called": 'The thing in the picture is called, in one word:"',
    "looks": "It looks like a",
    "lookslike": "It looks like",
    "isa": "It is a",
    "see": "In the picture you can see a",
    "imagine": "Imagine it. It looks like a",
    "small": "It looks like a small",
    "remind": "It reminds me of a",
}


def suffix_ids(data, prompt: str, family: str) -> tuple:
    """Return a prompt's ids; after a caption it is a sentence more, after a chat's opening it is the first."""
    text = PROMPTS[prompt]
    return data.ids((" " if family.startswith(("cap", "ans", "own")) else "") + text) if text else ()
