"""Commands that need the core only: `plugins`, `doctor` and `new-plugin`.

Each is a module with a function `run`, which takes what follows the command's name, prints plain text, and returns the
exit code.
"""
