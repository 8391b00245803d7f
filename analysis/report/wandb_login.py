"""Whether this machine has a key for Weights & Biases, without asking for one."""

import netrc
import os
from urllib.parse import urlparse


def is_logged_in() -> bool:
    """A key or identity token in the environment, or an entry for W&B's host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
