"""What a vLLM server runs for midtune: load trained blocks, and say which are loaded.

It is imported in the server's environment, which has vLLM, not midtune's requirements:
`vllm serve --worker-extension-cls midtune.rollout.vllm_worker.BlockLoader`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


class BlockLoader:
    """Methods that vLLM adds to each of its workers, for `/collective_rpc`."""

    midtune_digest: str | None = None

    def load_blocks(self: Any, path: str) -> None:
        """Load the tensors of a safetensors file, under the checkpoint's names."""
        from safetensors.torch import load

        content = Path(path).read_bytes()
        # A load that fails may leave the blocks half replaced.
        self.midtune_digest = None
        self.reload_weights(weights_iterator=iter(load(content).items()))
        self.midtune_digest = hashlib.sha256(content).hexdigest()

    def blocks_digest(self) -> str:
        """SHA-256 of the file whose blocks are loaded; empty if none was loaded by this process."""
        return self.midtune_digest or ""
