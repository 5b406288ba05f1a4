"""Dialogues in which no picture belongs, and where sentences end in ids."""

from __future__ import annotations

from typing import Any

# {np} is a concept's phrase, {name} its name.
NO_PICTURE_FITTED = (
    "What is the capital of France?",
    "How many days are there in a leap year?",
    "Write a short poem about the rain.",
    "What is 17 plus 25?",
    "How do I say good morning in Spanish?",
    "Give me three tips for a good night's sleep.",
    "Thank you, that was kind of you.",
    "Hello, how are you today?",
    "Who wrote Romeo and Juliet?",
    "Explain gravity in one sentence.",
    "Write a Python function that reverses a string.",
    "What does the word frugal mean?",
    "Is it better to rent or to buy a house?",
    "Summarise the plot of Cinderella.",
    "Translate 'I am hungry' into German.",
    "I feel a bit sad today.",
    "What time is it best to go to bed?",
    "How long does it take to boil an egg?",
    "Name three European countries.",
    "What is the past tense of go?",
    "How do you spell {name}?",
    "How many letters does the word {name} have?",
    "Where does the word {name} come from?",
    "What does {np} cost?",
    "Write a sentence with the word {name} in it.",
    "Is {np} dangerous?",
    "Translate the word {name} into French.",
    "Which words rhyme with {name}?",
    "Is {name} a noun or a verb?",
    "Who invented {np}?",
    "Do not show me {np}, just say yes or no: have you heard of it?",
    "Should I worry about {np}?",
)
NO_PICTURE_CHOOSING = (
    "What is the boiling point of water?",
    "Can you help me with my homework?",
    "Which is larger, 9 or 11?",
    "Write an email to my boss saying that I am ill.",
    "Who was the first president of the United States?",
    "What is the plural of {name}?",
    "Why do people like {np}?",
    "How old is {np}?",
    "Could you define {name} for me?",
    "Good night!",
)
NO_PICTURE_REPORTED = (
    "What is the square root of 81?",
    "How can I learn to swim?",
    "Tell me a joke.",
    "What is the opposite of cold?",
    "When did the Second World War end?",
    "What is the best way to save money?",
    "Say the word {name} twice.",
    "Is it rude to talk about {np}?",
    "What would you do without {np}?",
    "How do I pronounce {name}?",
)


def sentence_end(ids: list[int], tokenizer: Any, stop: int | None) -> int | None:
    """Return after how many ids the first sentence ends, or None; numbers of lists end none."""
    text = ""
    for n, token in enumerate(ids):
        if token == stop:
            return n if n else None
        piece = tokenizer.decode([token])
        text += piece
        bare = piece.rstrip("\"'\u201d )*")
        following = tokenizer.decode([ids[n + 1]]) if n + 1 < len(ids) and ids[n + 1] != stop else " "
        ended = bare.endswith((".", "!", "?", "\n")) and following[:1].isspace() and len(text.split()) > 1
        if ended and not text.strip().rstrip(".")[-1:].isdigit():
            return n + 1
    return None
