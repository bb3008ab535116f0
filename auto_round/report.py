def render_html(report: dict) -> str:
    return "<html></html>"
