"""A task file that is played in turns."""

OWN = '''
def rows():
    return [{"prompt": "Guess.", "seed": seed} for seed in range(12)]

class Environment:
    def reset(self, seed, **row):
        self.number, self.done, self.tries = seed % 3, False, 0
        return " It is below 3."

    def step(self, action):
        """Guess a number."""
        if not action.isdigit():
            raise ValueError("That is no number.")
        self.tries += 1
        self.done = int(action) == self.number
        return "Right." if self.done else "Wrong."

    def get_reward(self):
        return float(self.done) / max(self.tries, 1)
'''
