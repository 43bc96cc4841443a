"""The dialects that clients speak over HTTP: each reads a request as a `Question` and writes an answer in its own form.

Requests are read in another process (`api.reading`), so these modules import no libraries of an engine or a server.
"""
