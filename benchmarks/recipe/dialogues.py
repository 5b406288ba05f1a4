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
# Added after precision on validation was 0.77 with the list above alone.
NO_PICTURE_MORE = (
    "What is the tallest mountain on Earth?",
    "Who painted the Mona Lisa?",
    "What is the freezing point of water in Fahrenheit?",
    "How many legs does a spider have?",
    "When was the telephone invented?",
    "Who was the second man on the moon?",
    "What is the currency of Japan?",
    "Which planet is closest to the sun?",
    "What is 12 times 12?",
    "Is 91 a prime number?",
    "Which number is smaller, 3 or 4?",
    "What is the cube root of 27?",
    "How do I convert miles to kilometres?",
    "Help me with my essay, please.",
    "Can you help me to plan my week?",
    "Could you check my grammar?",
    "Write a letter to my landlord about the heating.",
    "Write a short apology to a friend.",
    "Draft a message to my teacher.",
    "Give me a recipe for pancakes.",
    "How do I fix a flat tyre?",
    "How can I learn to play chess?",
    "What is a good way to learn a language?",
    "How do I save energy at home?",
    "What should I do when I cannot sleep?",
    "Good morning!",
    "Goodbye, see you tomorrow.",
    "Thanks a lot!",
    "How was your day?",
    "What is your name?",
    "Are you a robot?",
    "I am bored.",
    "Tell me a fun fact.",
    "Tell me a riddle.",
    "Sing me a song.",
    "What is the opposite of dark?",
    "What is a synonym of happy?",
    "Define the word honesty.",
    "What is the plural of mouse?",
    "Correct this sentence: he go to school.",
    "Translate 'see you soon' into Italian.",
    "How do you say thank you in Japanese?",
    "When did the Roman Empire fall?",
    "Why is the sky blue?",
    "What causes earthquakes?",
    "Explain how a bill becomes a law.",
    "What is inflation?",
    "Is it polite to arrive late?",
    "What would you do with a million dollars?",
    "Should I study law or medicine?",
    "What is the meaning of {name}?",
    "What is another word for {name}?",
    "How is {name} pronounced?",
    "What is the plural form of {name}?",
    "Can you use {name} in a question?",
    "Say {name} backwards.",
    "Repeat after me: {name}.",
    "Count the vowels in {name}.",
    "Give me a definition of {name}.",
    "Is {name} an English word?",
    "How do you say {name} in Spanish?",
    "Where can I buy {np}?",
    "How much does {np} weigh?",
    "How long does {np} last?",
    "Why are people afraid of {np}?",
    "Do you like {np}?",
    "What is {np} used for?",
    "How many kinds of {name} are there?",
    "When was {np} first mentioned in a book?",
    "Would you rather have {np} or money?",
    "I do not like {np}.",
    "My brother talked about {np} yesterday.",
    "Is it legal to own {np}?",
    "Write a rhyme about {np}.",
    "What are the advantages of {np}?",
    "How would you describe the history of {np}?",
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
