"""The dialects that clients speak over HTTP: what each asks, as a `Question`, and how each tells an answer.

They are read in another process too (`api.reading`), and import neither an engine's libraries nor a server's.
"""
