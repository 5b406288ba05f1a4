"""Held-out wordings by a second author, who saw neither those that are fitted nor those of benchmarks/emission.py.

{np} stands for a thing with its article ("a violin"), {name} for the bare name ("violin").
"""

# The user's first message; asks to see a picture of {np}.
FIRST_VALIDATION = (
    "Could you show me a picture of {np}, please?",
    "I'd like to see {np}.",
    "Pic of {np}?",
    "Have you got any photos of {np}?",
    "Hi there, would you mind putting up an image of {np} for me?",
    "Let me have a look at {np}.",
    "My daughter has never seen {np}, so please bring one up on the screen. Just a picture will do.",
    "Display {np}.",
    "Any chance of a photo of {np}?",
    "I'm teaching a class this afternoon and need a picture of {np} to put in front of the children.",
    "go on, give us a peek at {np}",
    "Find me an image that has {np} in it.",
    "Draw {np} for me.",
    "Can I see what {np} looks like in a photograph?",
    "Good morning! A picture of {np} would brighten my day.",
    "I want to look at {np}. Can you manage that?",
)

FIRST_TEST = (
    "Please get me a snapshot of {np}.",
    "Are you able to pull up {np} so that I can see it?",
    "{np}, as a picture, please",
    "Image of {np}.",
    "I can't quite imagine {np}; it would help to be shown one.",
    "Hello! May I view a photograph of {np}?",
    "wanna see {np}",
    "What I need is some visual of {np}, whatever you can find.",
    "Would it be possible to see {np} here in the chat?",
    "I was told you can do pictures, so do me {np}.",
    "Sketch {np}, would you?",
    "Make me a picture with {np} in the middle of it.",
    "My grandson and I were arguing about the shape of {np}, so kindly let us see one and settle it.",
    "Got a nice image of {np} lying around?",
    "Send over {np}, in picture form.",
    "Before I try to paint {np}, I need a photo to copy from. Can you give me one?",
)

# The user's first message; no picture is wanted.
OTHERS_VALIDATION = (
    # About the thing, but not asking to see it.
    "How do you spell {name}?",
    "Write me a short poem about {np}.",
    "What is the French word for {name}?",
    "I dreamt about {np} last night.",
    "Roughly how much does {np} weigh?",
    "Where does the word {name} come from?",
    "Please tell me three facts about {np}, in words only.",
    "How would you explain {np} to a child of five?",
    "My neighbour gave me {np} for my birthday and I don't know what to say.",
    "Is {np} mentioned anywhere in Shakespeare?",
    # About anything else.
    "What is seventeen times four?",
    "Hello, how are you getting on today?",
    "Who was the first person to walk on the moon?",
    "Translate 'good night, sleep well' into Spanish.",
    "What's the capital of Norway?",
    "Help me write a polite note to my landlord about the heating.",
    "Why is the sky blue?",
    "Tell me a joke.",
    "If I leave at half past two and drive for three hours, when do I arrive?",
    "I'm so bored.",
    "How many days are there in a leap year?",
    "Give me a word that rhymes with 'table'.",
    "What should I cook for six people on a small budget?",
    "Do you ever get tired?",
    "Show me how to work out a percentage.",
    "Which river runs through Vienna?",
    "Correct this sentence: me and him was late.",
    "it's raining again, typical",
    "I have an interview tomorrow and I'm nervous. What should I say if they ask about my weak points?",
    "What is your name?",
)

OTHERS_TEST = (
    # About the thing, but not asking to see it.
    "Does {name} have a plural, and what is it?",
    "Make up a bedtime story in which a mouse finds {np}.",
    "What do Germans call {np}?",
    "Yesterday I saw {np} on my way to work, believe it or not.",
    "What would I expect to pay for {np} these days?",
    "How many letters are there in {name}?",
    "Don't bother with a picture, just define {name} for me.",
    "My sister is afraid of {np}. Is that common?",
    "Do you like {name}?",
    "Compose a funny limerick with {np} in the second line.",
    # About anything else.
    "Add 238 and 94 for me.",
    "Evening! Nice to meet you.",
    "When did the Second World War end?",
    "How would an Italian say 'where is the station'?",
    "Name the largest ocean.",
    "Draft an email asking my boss for Friday off.",
    "What makes the tides go in and out?",
    "Got any good riddles?",
    "A shirt costs twenty pounds and is reduced by a quarter. What is the new price?",
    "I couldn't sleep at all last night.",
    "What is the difference between weather and climate?",
    "Give me another way of saying 'very tired'.",
    "How long should I boil an egg if I like it soft?",
    "Are you a real person?",
    "Can you see me?",
    "Who wrote Pride and Prejudice?",
    "Turn this into the past tense: she runs to the shop.",
    "ugh, mondays",
    "I've just moved to a new town where I know nobody. How do people make friends at my age?",
    "Picture this: I'm on stage and I forget every line. What a disaster that was!",
)

# A later message, after a picture of or some text about another thing;
# asks to see {np} now.
NEXT_VALIDATION = (
    "Now show me {np}.",
    "Lovely. Could I see {np} next?",
    "And a picture of {np}?",
    "Thanks for that! Please do the same with {np}.",
    "Okay, what about a photo of {np} this time?",
    "That's not what I was after. I wanted to see {np}.",
    "Swap it for {np}, please.",
    "Great, next picture: {np}.",
    "Right, I've seen enough of that one. Let's have a look at {np} instead.",
    "Ha, brilliant! Go on then, do {np}.",
    "Interesting, but I'd rather be looking at {np}. Can you put one up?",
    "Could you follow that with an image of {np}?",
    "Next, I would love to see {np}, if it isn't too much trouble.",
    "One more: {np}.",
    "Let's change the subject. Can you bring up a picture of {np}?",
    "can u show {np} as well",
)

NEXT_TEST = (
    "Very good. My turn to choose again, and I choose a picture of {np}.",
    "Have you an image of {np} too?",
    "Not that, {np}! Try the picture again.",
    "Cheers. Now give me {np} to look at.",
    "While you're at it, let me see {np}.",
    "Moving on, please display {np}.",
    "I see. And how does {np} look? Show me.",
    "So that's what that is. I'd be glad of a photograph of {np} so that I can compare the two.",
    "{np} now please",
    "Replace that with a shot of {np}.",
    "Oh, you can do pictures! Then draw me {np}.",
    "Enough reading for one day. Find a nice photo of {np} for us.",
    "Same again, only with {np}.",
    "After that, my son is asking whether he may see {np}. May he?",
    "nah, get {np} up on here instead",
    "Wonderful, thank you. The last one I need for my poster is {np}, so please send me that image.",
)

# A later message in such a chat; no picture is wanted.
NEXT_OTHERS_VALIDATION = (
    # Naming a thing without asking to see it.
    "It reminds me of {np}.",
    "Is that bigger than {np}?",
    "My aunt used to have {np}, you know.",
    "How is that different from {np}? A sentence will do.",
    "I thought at first that it was {np}.",
    "Now write two lines of verse about {np}.",
    "Which is the more expensive, that or {np}?",
    "Okay, and what is the Welsh for {np}?",
    "I don't need to see {np}, but do tell me where the name comes from.",
    "Funny, I was talking about {np} with a friend only this morning.",
    # Anything else.
    "Thank you, that's just what I wanted.",
    "Wow, that's beautiful!",
    "Where do they come from?",
    "Is it dangerous?",
    "I don't believe you.",
    "What did you mean by that last bit?",
    "Nice one.",
    "How old is it, do you think?",
    "Let's talk about something else. What are you good at?",
    "Can you say that again in simpler words?",
    "By the way, what is nine squared?",
    "That picture is a bit blurred, but never mind.",
    "lol",
    "Why is it that colour?",
    "Who took the photo?",
    "No more pictures for now, thanks.",
    "I have to go now. Bye!",
    "What's it used for?",
    "Anyway, could you help me with a letter to the council about the bins in our street?",
    "Hmm, I expected something larger.",
)

NEXT_OTHERS_TEST = (
    # Naming a thing without asking to see it.
    "Looks a lot like {np} if you ask me.",
    "Would {np} cost less than that one?",
    "I once lost {np} on a train, but that's a long story.",
    "Are you sure that isn't {np}?",
    "Let's leave that. Tell me in a few words why people care about {np}.",
    "Good. Now use {name} in a sentence.",
    "Honestly, I prefer {np}.",
    "What do that and {np} have in common?",
    "I've already seen {np}, so there's no need for another picture of one.",
    "And who invented the word {name}?",
    # Anything else.
    "Ta very much.",
    "That made me laugh.",
    "How heavy would that be?",
    "Could a child use it safely?",
    "You've got that wrong, I think.",
    "Tell me more.",
    "What is that in the background?",
    "When were they first made?",
    "New topic: who won the World Cup in 1966?",
    "Please shorten what you just wrote to one line.",
    "Quick sum: what is 150 divided by six?",
    "I like the light in that photo.",
    "oh dear, that's ugly",
    "Does it always look like that?",
    "Did you make that image yourself?",
    "You can stop showing me things, I've got plenty.",
    "Right, I'm off to bed. Speak soon.",
    "Do people in other countries call it something else?",
    "Never mind all that, my car won't start and I'm meant to be in Leeds by noon. Any ideas?",
    "I see what you mean.",
)

WORDINGS = {"validation": FIRST_VALIDATION, "test": FIRST_TEST}
OTHERS = {"validation": OTHERS_VALIDATION, "test": OTHERS_TEST}
NEXT = {"validation": NEXT_VALIDATION, "test": NEXT_TEST}
NEXT_OTHERS = {"validation": NEXT_OTHERS_VALIDATION, "test": NEXT_OTHERS_TEST}
