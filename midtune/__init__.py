"""midtune: reinforcement learning of one transformer block over a frozen 4-bit model."""

import os

__version__ = "0.1.0"

# Nothing is sent anywhere unless asked for: TRL and the hub client report usage by default.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
