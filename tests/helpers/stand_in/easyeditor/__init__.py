"""A small host that follows EasyEdit's contract, defects included, so that the plugin is tested without EasyEdit.

Written from scratch for these tests. What it gets wrong, EasyEdit gets wrong: state in module globals, families told by
substrings of names, look-ups that padding on the left or a tied head breaks, flags left changed, files strewn about.
"""

from .editors.editor import BaseEditor
from .util.alg_dict import ALG_DICT

__all__ = ["ALG_DICT", "BaseEditor"]
