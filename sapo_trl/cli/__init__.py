"""The commands. What they are told by dotted path (rewards, objectives) may lie in the folder they are typed in."""

import os
import sys

if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # last, so that it hides nothing
