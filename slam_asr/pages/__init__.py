"""Self-contained HTML pages. Style, script and drawings are in the file; a page fetches and saves nothing.

The pages open from disk and in a sandboxed frame of the dashboard.
"""
