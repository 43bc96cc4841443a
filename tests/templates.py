"""Chat templates in the manner of well-known models, for seedling's tokenizer."""

_TURNS = """
{%- for message in messages -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content -}}
{%- for call in message.tool_calls or [] -%}
%CALL%
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_TOOLS = """
{%- if tools -%}
{{- '<|im_start|>system\\n%WORDS%\\n' -}}
{%- for tool in tools -%}{{- tool | tojson ~ '\\n' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
"""

PLAIN = _TURNS.replace("%CALL%", "")
# As Qwen's and Hermes' models write calls down.
HERMES = _TOOLS.replace(
    "%WORDS%", 'Call a tool by <tool_call>{"name": ..., "arguments": ...}</tool_call>.'
) + _TURNS.replace(
    "%CALL%",
    """
{%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
""",
)
# As Llama 3.1 does: one call a turn and nothing around it.
LLAMA = _TOOLS.replace("%WORDS%", "Tools:") + _TURNS.replace(
    "%CALL%",
    """
{%- if not loop.last -%}{{- raise_exception('one call a turn') -}}{%- endif -%}
{{- '{"name": "' ~ call.function.name ~ '", "parameters": ' ~ (call.function.arguments | tojson) ~ '}' -}}
""",
)
