"""What a benchmark complains of."""


class BadData(ValueError):
    """Files that are not what they should be."""
