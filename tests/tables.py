"""Markdown tables as they read, whatever the widths of their columns."""

import re


def unpadded(text):
    """Return the text with a single space wherever there are several."""
    return re.sub(" +", " ", text)
