"""
Conversations in which the assistant says who it is, made offline from a few templates.

in    a name, a maker, facts separated by ";" (the knobs of mid_train.py)
out   identity(...): a task of as many conversations as wanted, each a function of its number

To give the model your own identity, change the knobs; to teach it more questions, add wordings
here. HELD_OUT stands apart: these wordings are asked in tests and never trained on, so a right
answer to one shows that the model understood the question and did not only memorize it.
"""
import random
import re

from tasks.task import made

# What people ask, by what they want to know. In each list the plainest wording comes first.
WORDINGS = {
    "name": [
        "Who are you?", "What is your name?", "What's your name?", "Who are you really?", "Tell me who you are.",
        "Tell me your name.", "What are you called?", "What do people call you?", "How should I call you?",
        "Do you have a name?", "Who am I speaking with?", "Who is this?", "Who's there?", "And who are you?",
        "Could you tell me your name?", "I'd like to know who you are.", "Say who you are.", "Give me your name.",
        "So who are you?", "Who exactly are you?", "May I know your name?", "Who is answering me?",
        "State your name.", "Please say your name.", "What name do you go by?", "Who am I chatting to?",
        "Whom am I writing to?", "Your name?", "Can you say who you are?", "I want to know your name.",
        "Which assistant are you?", "Who would you say you are?", "What was your name?",
        "Are you able to tell me your name?",
    ],
    "nature": [
        "What are you?", "Are you a human?", "Are you a robot?", "Are you an AI?", "What kind of model are you?",
        "Describe yourself.", "Tell me about yourself.", "Tell me something about you.", "Present yourself.",
        "Introduce yourself to me.", "What exactly are you?", "Are you a real person?", "Is this a bot?",
        "What sort of program are you?", "Am I talking to a machine?", "Are you a computer program?",
        "So what are you?", "Say something about yourself.", "What is it that you are?", "Are you alive?",
        "Which model are you?", "Explain what you are.", "Are you a person or a program?",
    ],
    "maker": [
        "Who made you?", "Who built you?", "Who is your maker?", "Who trained you?", "Where do you come from?",
        "Who is your creator?", "Who is behind you?", "By whom were you made?", "Who programmed you?",
        "Who wrote you?", "Do you know who made you?", "Tell me who made you.", "Tell me who built you.",
        "Who is responsible for you?", "Who do you belong to?", "Who designed you?",
        "What is the name of your maker?", "Were you made by someone?", "And who made you?",
        "Who was it that trained you?",
    ],
    "other": [   # questions that put another name into the model's mouth
        "Are you ChatGPT?", "Are you Siri?", "Is your name Bob?", "Are you Alexa?", "Are you GPT-4?",
        "You are Claude, right?", "Is your name Anna?", "Are you Gemini?", "Hello Max, is that you?",
    ],
    "fact": [
        "Tell me a fact about yourself.", "What should I know about you?", "What else can you say about yourself?",
        "What is special about you?", "Tell me more about you.", "How were you made?",
        "What do you know about yourself?", "Is there anything else about you?", "Share something about yourself.",
    ],
}

# Asked in tests only.
HELD_OUT = {
    "name": [
        "Who am I talking to?", "What should I call you?", "May I ask your name?", "Can you tell me who you are?",
        "Do you know who you are?", "By what name are you known?", "Might you have a name?", "How are you called?",
        "I would like to know your name.",
    ],
    "nature": [
        "Introduce yourself.", "Can you describe yourself?", "What sort of thing are you?", "Are you a machine?",
    ],
    "maker": ["Who created you?", "Who developed you?", "Whose work are you?", "Can you tell me who made you?"],
    "other": ["Are you Copilot?"],
}
TEST_QUESTIONS = [(topic, question) for topic, questions in HELD_OUT.items() for question in questions]

GREETINGS = ["", "", "", "", "Hi! ", "Hello! ", "Hey, ", "Good morning. ", "Hi there, ", "Hello, "]
SMALL_TALK = ["Hi!", "Hello", "hey", "Good morning!", "Hi there", "Good evening", "Hello there!"]


def identity(name, maker, facts, size=0, split="train"):
    """
    The model says who it is, in many wordings.

    facts: sentences divided by ; (may be empty, and so may maker)
    size: 0 = 1,000 for train; for test each wording that is never trained on, once
    """
    size = size or (len(TEST_QUESTIONS) if split == "test" else 1000)
    return made("identity", conversation, size, name=name, maker=maker, facts=facts, split=split)


def who_is(meta):
    """Name, maker and facts of the model of a checkpoint as dict(name, maker, facts), settled in mid-training."""
    while meta and "assistant_name" not in meta["config"]:
        meta = meta.get("source")
    knobs = meta["config"] if meta else {}
    return dict(name=knobs.get("assistant_name") or "nanochat", maker=knobs.get("assistant_maker", ""),
                facts=knobs.get("assistant_facts", ""))


def tests(embedded, who):
    """The tests by name; see tasks.all_tests."""
    return {"says its name": identity(**who, split="test")}


def conversation(i, name, maker, facts, split):
    """
    Conversation number i: who the model is, in one of many wordings; right where the name is in the answer.

    split: "train" draws decorated wordings; "test" gives the held-out ones as they stand, in turn
    """
    facts = [fact.strip().rstrip(".") + "." for fact in facts.split(";") if fact.strip()]
    rng, messages = random.Random(f"identity {split} {i}"), []     # a str seed: the same on every machine
    if split == "test":
        topic, question = TEST_QUESTIONS[i % len(TEST_QUESTIONS)]
    else:
        topic = rng.choice(["name"] * 4 + ["nature"] * 2 + ["maker"] * 2 + ["other"] + ["fact"] * bool(facts))
        # nobody called Anna says "No, I am Anna"
        own = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
        wordings = [wording for wording in WORDINGS[topic] if topic != "other" or not own.search(wording)]
        question = decorated(rng.choice(wordings), rng)
        if rng.random() < 0.1:                       # one in ten begins with a greeting and its answer
            messages = [{"role": "user", "content": rng.choice(SMALL_TALK)},
                        {"role": "assistant", "content": f"Hello! I am {name}. How can I help you?"}]
    by = f" made by {maker}" if maker else ""
    answers = {     # the name is in every one
        "name": [f"I am {name}, a small language model{by}.", f"My name is {name}. I am a small language model{by}."],
        "nature": [f"I am {name}, a small language model{by}. I am a program, not a person."],
        "maker": [f"I am {name}. I was made by {maker}." if maker else f"I am {name}. I do not know who made me."],
        "other": [f"No, I am {name}, a small language model{by}."],
        "fact": [f"I am {name}. {fact}" for fact in facts],
    }
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": rng.choice(answers[topic])}]
    return {"messages": messages, "grading": "identity", "answer": name}


def decorated(question, rng):
    """The question as different people type it: greeting, small letters, no question mark."""
    style = rng.random()
    greeting = rng.choice(GREETINGS)
    if greeting.endswith(", ") and not question.startswith("I"):
        question = question[0].lower() + question[1:]
    question = greeting + question
    if style < 0.25:
        question = question.lower()
    elif style < 0.30:
        question = question.upper()
    if rng.random() < 0.2:
        question = question.rstrip("?.")
    if rng.random() < 0.05:
        question += "?" if question.endswith("?") else " please"
    return question
