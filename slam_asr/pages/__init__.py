"""Templates and drawings of the HTML pages.

Each page is one file with its style, script and drawings. It fetches and saves nothing, and opens from disk
and in a sandboxed frame of the dashboard. The exception is `serve.html`, which sends recordings to the server
that it comes from.
"""
