"""Self-contained HTML pages: style, script and drawings inside, nothing fetched, nothing kept.

They open from disk and in a sandboxed frame of the dashboard.
"""
