"""Word problems of one step, made up from a few sentences; a task in one file, as `--task` takes it."""

import random

NAMES = ("Anna", "Ben", "Chen", "Dana", "Emil", "Fatima", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "cards", "pencils", "shells", "stamps", "stickers")
# A story, its question, and the answer from the numbers a > b.
STORIES = (
    ("{name} has {a} {things} and finds {b} more.", "does {name} have now", lambda a, b: a + b),
    ("{name} had {a} {things} and gave {b} of them away.", "does {name} have left", lambda a, b: a - b),
    ("{name} has {a} {things} and {other} has {b}.", "do they have together", lambda a, b: a + b),
    ("{name} has {a} {things}. {other} has {b} fewer.", "does {other} have", lambda a, b: a - b),
)


def rows():
    rng = random.Random(0)
    found = []
    for _ in range(4000):
        name, other = rng.sample(NAMES, 2)
        story, question, answer = rng.choice(STORIES)
        b = rng.randint(2, 6)
        a = rng.randint(b + 1, 12)
        words = {"name": name, "other": other, "things": rng.choice(THINGS), "a": a, "b": b}
        text = f"{story} How many {{things}} {question}?".format(**words)
        found.append({"prompt": text, "answer": str(answer(a, b))})
    return found
