"""What `[RET]` is fitted to: how a user asks for a picture, and dialogues in which no picture belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visual_ground.training.initialization.idf import without_sentence_marks

# Captions become requests where the data has none.
REQUESTS = (
    "Show me a picture: {it}.",
    "Can I see this? {it}",
    "Find me an image of {it}, please.",
    "I am looking for a photo or drawing: {it}.",
    "Show me {it}.",
    "Do you have a picture of {it}?",
)
# Without pictures. Many are about things as well ("{it}"), so that not every thing that is named is shown.
OTHERS = (
    "What is the capital of Italy?",
    "How many minutes are there in a day?",
    "Write a short poem about spring.",
    "What is 14 plus 27?",
    "How do I say good night in French?",
    "Give me three tips for staying healthy.",
    "Thank you, that was very helpful.",
    "Hello, how are you?",
    "Who wrote Hamlet?",
    "Explain magnetism in one sentence.",
    "Write a Python function that sorts a list.",
    "What does the word diligent mean?",
    "Is it better to walk or to drive to work?",
    "Summarise the plot of Snow White.",
    "Translate 'I am tired' into German.",
    "I feel lonely today.",
    "What time should children go to bed?",
    "How long does it take to cook rice?",
    "Name three rivers in Europe.",
    "What is the past tense of run?",
    "What is the longest river in the world?",
    "Who composed the Ninth Symphony?",
    "At what temperature does iron melt?",
    "When was printing invented?",
    "Who was the first woman in space?",
    "What is the currency of Brazil?",
    "Which planet is the largest?",
    "What is 13 times 11?",
    "Is 57 a prime number?",
    "Which number is larger, 8 or 6?",
    "How do I convert pounds to kilograms?",
    "Help me with my report, please.",
    "Can you help me to plan a trip?",
    "Could you check my spelling?",
    "Write a letter to my neighbour about the noise.",
    "Write a short thank-you note to a colleague.",
    "Give me a recipe for soup.",
    "How do I change a light bulb?",
    "How can I learn to play the guitar?",
    "What is a good way to remember names?",
    "How do I save water at home?",
    "What should I do when I am nervous?",
    "Good morning!",
    "Goodbye, until tomorrow.",
    "Thanks!",
    "How was your weekend?",
    "What is your name?",
    "Are you a human?",
    "Tell me something interesting.",
    "Tell me a riddle.",
    "What is the opposite of heavy?",
    "What is a synonym of angry?",
    "Define the word courage.",
    "What is the plural of child?",
    "Correct this sentence: she have two brother.",
    "How do you say please in Japanese?",
    "When did the Middle Ages end?",
    "Why is the sea salty?",
    "What causes thunder?",
    "Explain how elections work.",
    "What is a mortgage?",
    "Is it polite to call late at night?",
    "What would you do if you were rich?",
    "Should I study physics or history?",
    "Write a story about an old king.",
    "Tell me about the history of Rome.",
    'How do you spell "{it}"?',
    'How many letters are there in "{it}"?',
    'Translate "{it}" into Spanish.',
    'What rhymes with "{it}"?',
    'What does "{it}" mean?',
    'Where do the words "{it}" come from?',
    'Give me a definition of "{it}".',
    "Could you define {it}?",
    'Is "{it}" good English?',
    'Say "{it}" backwards.',
    'Repeat after me: "{it}".',
    'Use "{it}" in a sentence.',
    "How much does {it} cost?",
    "How old can {it} be?",
    "How long does {it} last?",
    "Is {it} dangerous?",
    "Who invented {it}?",
    "Why do people like {it}?",
    "Why are people afraid of {it}?",
    "Do you like {it}?",
    "What is {it} used for?",
    "What is {it} made of?",
    "How is it to own {it}?",
    "Where can I buy {it}?",
    "Would you rather have {it} or money?",
    "I do not like {it}.",
    "My sister told me about {it} yesterday.",
    "I had a dream about {it}.",
    "Write a rhyme about {it}.",
    "Write an essay about {it}.",
    "What are the advantages of {it}?",
    "Do not show me {it}, only say yes or no: have you heard of it?",
    "Is it true that {it} brings luck?",
    "Explain the history of {it}.",
)
# Chats of two turns that end with a request, and those that end with something else.
NUM_NEXT_REQUESTS, NUM_NEXT_OTHERS = 64, 160
NEXT_REQUESTS = (
    "Now {it}.",
    "Show me {it} too.",
    "What about {it}?",
    "Next, {it}.",
    "I would also like to see {it}.",
    "Can you show me {it} as well?",
)
NEXT_OTHERS = (
    "Thank you!",
    "That is nice.",
    "Which of them is bigger?",
    "Why is that?",
    "Tell me more.",
    "What does it cost?",
    "How do you spell that?",
    "Where does it come from?",
    "Are you sure?",
    "What else do you know about it?",
    "Is it the same as {it}?",
    "How does it compare to {it}?",
    "Which is older, this or {it}?",
    "Say that in one sentence.",
    "Let us talk about something else.",
    "What is {it} for?",
    "I see.",
    "Really?",
    "How old is it?",
    "Who told you that?",
    "Do you prefer {it}?",
    "Can you repeat that?",
    "What do you think about {it}?",
    "How heavy is it?",
    "Where did you learn this?",
)


def requests_of(captions: Sequence[str]) -> list[str]:
    """Return a request for each caption, in different words."""
    return [
        REQUESTS[i % len(REQUESTS)].format(it=without_sentence_marks(caption)) for i, caption in enumerate(captions)
    ]


def others_about(captions: Sequence[str]) -> list[str]:
    """Return all the dialogues without pictures, those about something with two of the shorter captions each."""
    things = sorted({without_sentence_marks(caption) for caption in captions}, key=lambda text: (len(text), text))
    things = things[: max(1, len(things) // 2)] or ["it"]
    step = max(1, len(things) // len(OTHERS))
    turns = ((other, i * step + turn) for i, other in enumerate(OTHERS) for turn in (0, 1))
    return list(dict.fromkeys(other.replace("{it}", things[n % len(things)]) for other, n in turns))


def later_turns(
    captions: Sequence[str], requests: Sequence[str], answered: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return chats of two turns: those whose second turn asks for a picture, and those whose second does not.

    Args:
        captions: what pictures show.
        requests: how users ask for pictures; every second of the next requests is one of these.
        answered: what the user said first, and the first sentence of the answer.
    """
    if not answered:
        return [], []
    things = evenly([without_sentence_marks(caption) for caption in captions], NUM_NEXT_OTHERS)
    asked = [
        requests[i * len(requests) // NUM_NEXT_REQUESTS]
        if i % 2
        else NEXT_REQUESTS[i // 2 % len(NEXT_REQUESTS)].format(it=things[-1 - i % len(things)])
        for i in range(NUM_NEXT_REQUESTS)
    ]
    others = [
        NEXT_OTHERS[i % len(NEXT_OTHERS)].replace("{it}", things[i % len(things)]) for i in range(NUM_NEXT_OTHERS)
    ]
    return _behind(answered, asked), _behind(answered, others)


def _behind(answered: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Put each text behind a first turn and its answer, of which those at even distances are taken."""
    return [(*answered[i * len(answered) // len(texts)], text) for i, text in enumerate(texts)]


def evenly(texts: Sequence[Any], count: int) -> list[Any]:
    """Return at most so many, at even distances."""
    return [texts[i] for i in range(0, len(texts), -(-len(texts) // count))] if texts else []
