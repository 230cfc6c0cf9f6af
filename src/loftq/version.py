"""The version: of the package, of every manifest, of `loftq --version`."""

__version__ = "0.2.0"
