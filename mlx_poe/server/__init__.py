"""The runtime as a local service: OpenAI's HTTP API over one `Engine`, and a page that shows the
depth of every token.

- errors: what is wrong with a request, in OpenAI's shape
- fields: a request's JSON, read field by field; sampling: the fields that both endpoints share
- chat, completions: an endpoint each, from its fields to what it answers
- choice, logprobs: from the engine's responses to pieces of text and their log-probabilities
- serving: running sequences for a request, streaming, clients that leave or are slow
- catalog: the models served, by name
- guard: who may ask at all; metrics: what has happened; app: the routes
"""
