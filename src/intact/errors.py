"""The errors that users catch. Each says what is wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CaptureError",
    "DataError",
    "DataWarning",
    "EngineUnavailableError",
    "EngineWarning",
    "ExportError",
    "IntactError",
    "ModelError",
    "ModelWarning",
    "ProgramError",
    "QParamsError",
    "RecipeError",
    "StorageError",
]


class IntactError(Exception):
    """Base of every error that `intact` raises on purpose."""


class QParamsError(IntactError):
    """Quantization parameters that cannot be: a scale of 0, an odd zero point, an empty range."""


class ModelError(IntactError):
    """A user's network that cannot be loaded: code, an exported program, or weights of it."""


class ModelWarning(UserWarning):
    """A network can be used, but hardly is what its user means: batch norm never trained."""


class CaptureError(IntactError):
    """A module that cannot become a `Network`; lists every offender."""


class CalibrationError(IntactError):
    """Calibration data that cannot be used: none at all, NaN, infinite, the wrong shape."""


class RecipeError(IntactError):
    """A recipe that is malformed, or that names a layer or method which does not exist."""


class ProgramError(IntactError):
    """An integer program that breaks its own rules, or input codes that do not fit it."""


class EngineUnavailableError(ProgramError):
    """An engine that cannot run here: a package, a compiler or an instruction set is missing."""


class EngineWarning(UserWarning):
    """An engine works, but not as fast as it could: something that it would use is missing."""


class ExportError(IntactError):
    """A program that cannot be written in another format, or a format that does not exist."""


class StorageError(IntactError):
    """A file that cannot be read or written, or is not what it claims to be."""


class DataError(IntactError):
    """A data set that is missing, damaged or of the wrong layout."""


class DataWarning(UserWarning):
    """Data can be used, but hardly as it was meant: samples are left out, or come in any order."""
