"""The runtime as a local service: OpenAI's HTTP API over one `Engine`, and a page that shows the
depth of every token. The README's layout says what is in which module.
"""
