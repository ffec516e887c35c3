"""Every error that this project raises on purpose, and the warnings."""


class PoEError(Exception):
    """Base class for every error below; the message says what went wrong and what to do."""


class PoEWarning(UserWarning):
    """Base class for every warning that this project gives; commands show each as one line."""


class ConfigError(PoEError, ValueError):
    """A model configuration is incomplete or contradicts itself; names the field."""


class CheckpointError(PoEError):
    """A checkpoint's files are missing, damaged or mismatched; names the file or tensor."""


class TokenizerError(PoEError):
    """A tokenizer file cannot be read safely, or text or a token id cannot be converted."""


class RequestError(PoEError, ValueError):
    """The caller asked for something that does not exist: a mode, a stage, an empty prompt."""


class RankError(PoEError):
    """A pass failed on another machine that holds part of the model; names its rank."""


class RankLostError(RankError):
    """Another machine died or stopped answering, and is given up on; names its rank."""


class RollbackError(PoEError):
    """The decoding state no longer holds what the rollback needs."""


# Modes and options that version 0.2 had, each with what replaces it.
DELETED = {
    "certified": "speculative, with draft_bits for cheaper drafts",
    "draft_rank": "draft_bits",
    "draft_margin": "num_draft_tokens",
}


def deleted(name: object) -> str | None:
    """One line about a mode or option that was deleted; None about anything else."""
    instead = DELETED.get(name) if isinstance(name, str) else None
    return f"{name} no longer exists: use {instead}" if instead else None


def one_line(error: BaseException) -> str:
    """Another library's error message as one line of at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__
