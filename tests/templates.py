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

# As Qwen 3 does: reasoning between tags, calls and results of tools between others, results that follow each other in one turn.
_QWEN_TOOLS = """
{%- macro tool_lines() -%}
{{- '# Tools\\n\\nCall them by <tool_call>{"name": ..., "arguments": ...}</tool_call>.\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- tool | tojson ~ '\\n' -}}{%- endfor -%}
{{- '</tools>' -}}
{%- endmacro -%}
"""
_QWEN_HEAD = """
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content ~ '\\n\\n' -}}{%- endif -%}
{{- tool_lines() ~ '<|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' -}}
{%- endif -%}
"""
_QWEN_TURNS = """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if message.reasoning_content and %KEPT% -%}
{{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content or '' -}}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif not loop.first or message.role != 'system' or %SAYS_SYSTEM% -%}
{%- if %TOOLS_HERE% and loop.index0 == ns.last -%}{{- '<|im_start|>system\\n' ~ tool_lines() ~ '<|im_end|>\\n' -}}{%- endif -%}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _qwen(head: str, kept: str = "true", says_system: str = "false", tools_here: str = "false") -> str:
    turns = (
        _QWEN_TURNS.replace("%KEPT%", kept).replace("%SAYS_SYSTEM%", says_system).replace("%TOOLS_HERE%", tools_here)
    )
    return _QWEN_TOOLS + head + turns


QWEN = _qwen(_QWEN_HEAD)
# What was thought before the last question is dropped, as Qwen 3's own template does.
QWEN_FORGETFUL = _qwen(_QWEN_HEAD, kept="loop.index0 > ns.last")
# Tools stand before the last question, as in Mistral's templates.
QWEN_LATE_TOOLS = _qwen("", says_system="true", tools_here="tools")
