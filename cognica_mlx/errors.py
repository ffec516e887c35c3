"""Every error that this project raises on purpose; commands show each as one line."""


class PoEError(Exception):
    """Anything that went wrong in a way we can name; the message says what to do."""


class ConfigError(PoEError, ValueError):
    """A model configuration is incomplete or contradicts itself; names the field."""


class CheckpointError(PoEError):
    """A checkpoint's files are missing, damaged or do not fit; names the file or tensor."""


class TokenizerError(PoEError):
    """A tokenizer file cannot be read safely, or a text or token id cannot be translated."""


class RequestError(PoEError, ValueError):
    """The caller asked for something that does not exist: a mode, a stage, an empty prompt."""


class RankError(PoEError):
    """Another machine that holds a part of the model failed at a pass; names its rank."""


class RankLostError(RankError):
    """Another machine has died or does not answer, and will not be asked again; names its rank."""


class RollbackError(PoEError):
    """The decoding state no longer holds what a rollback would need."""


def one_line(error: BaseException) -> str:
    """What another library's error says, in one line that is not too long."""
    return " ".join(str(error).split())[:160] or type(error).__name__
