"""Self-contained HTML pages: style, script and drawings are in the file; pages fetch and save nothing.

They open from disk and in a sandboxed frame of the dashboard.
"""
