"""Moved to `mlx_poe.generation.tools` in 0.3; this path stays."""

from mlx_poe.generation.tools import ToolCall as ToolCall
from mlx_poe.generation.tools import ToolCallParser as ToolCallParser
from mlx_poe.generation.tools import check_call as check_call
from mlx_poe.generation.tools import tool_system_prompt as tool_system_prompt
