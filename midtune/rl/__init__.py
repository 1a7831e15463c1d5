"""Learning: TRL's losses and trainer over midtune's rollouts and log-probabilities."""
