"""The package's logger. `AR_LOG_LEVEL` sets its level; nothing else is configured on import."""

import logging
import os

logger = logging.getLogger("auto_round")


def setup_logging(level: str | None = None) -> None:
    """Send the package's messages to standard error. Only programs (the command line) call this."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel((level or os.environ.get("AR_LOG_LEVEL", "INFO")).upper())
