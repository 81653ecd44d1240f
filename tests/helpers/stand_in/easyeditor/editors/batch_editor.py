"""Which methods edit several requests in one call."""

from enum import Enum


class BatchEditor(Enum):
    MEMIT = "MEMIT"
    FT = "FT"
    EMMET = "EMMET"
    ALPHAEDIT = "AlphaEdit"
    ULTRAEDIT = "ULTRAEDIT"

    @staticmethod
    def is_batchable_method(alg_name: str):
        return alg_name in [member.value for member in BatchEditor]
