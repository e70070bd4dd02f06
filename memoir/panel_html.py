"""What the panel shows, as HTML. Prompts and answers are untrusted texts: whatever comes from outside is escaped."""

from __future__ import annotations

from html import escape

from memoir.records import EditRequest
from memoir.session import TOP, Answer, Reply, Session


def note_html(text: str) -> str:
    return f'<div role="status">{escape(text)}</div>'


def error_html(text: str) -> str:
    return f'<div role="alert" class="mm-error">{escape(text)}</div>'


def progress_html(text: str, done: int = 0, total: int = 0) -> str:
    """A bar without end where `total` is 0."""
    extent, count = (f'value="{done}" max="{total}"', f": {done} of {total} edits") if total else ("", " …")
    bar = f'<progress {extent} aria-label="{escape(text)}"></progress>'
    return f'<div role="status">{escape(text)}{count}</div>{bar}'


def title_html(session: Session) -> str:
    if session.editor is None:
        state = "no model open"
    else:
        parts = [session.model.name, session.editor.name, count(len(session.editor.edits), "edit")]
        state = " · ".join(parts + [f"{session.unsaved} not saved"] * bool(session.unsaved))
    return f'<div class="mm-title"><h2>memoir</h2><span>{escape(state)}</span></div>'


def edit_html(edit: EditRequest) -> str:
    whole = escape(f"{edit.prompt} → {edit.target}")
    return (
        f'<div class="mm-edit" title="{whole}"><span>{escape(edit.prompt)}</span> '
        f"<b>→&nbsp;{escape(edit.target)}</b></div>"
    )


def reply_html(reply: Reply | None) -> str:
    """Both answers side by side, then which edit was met; without a reply, the same room left empty."""
    if reply is None:
        empty = Answer(text="", tokens=(("", 0.0),) * TOP)
        sides = answer_html("Before", empty, "") + answer_html("After", empty, "")
        return f'<div class="mm-asked">&nbsp;</div><div class="mm-sides">{sides}</div>{_match("", "", None)}'
    changed = "unchanged" if reply.after.text == reply.before.text else "changed"
    return (
        f'<div class="mm-asked" title="{escape(reply.prompt)}">{escape(reply.prompt)}</div>'
        f'<div class="mm-sides">{answer_html("Before", reply.before, "")}'
        f"{answer_html('After', reply.after, changed)}</div>{match_html(reply)}"
    )


def answer_html(label: str, answer: Answer, badge: str) -> str:
    rows = "".join(
        f'<tr><td class="mm-token">{escape(_visible(token))}</td><td class="mm-share">'
        f'<div style="width:{100 * share:.1f}%"></div></td><td class="mm-percent">{_percent(share)}</td></tr>'
        if token
        else "<tr><td>&nbsp;</td><td></td><td></td></tr>"
        for token, share in answer.tokens
    )
    mark = f'<span class="mm-badge mm-{badge}">{badge}</span>' if badge else ""
    return (
        f'<section class="mm-side" aria-label="{label}"><h4>{label}{mark}</h4>'
        f'<div class="mm-answer">{escape(answer.text) or "&nbsp;"}</div>'
        f"<table><caption>Next token</caption>{rows}</table></section>"
    )


def match_html(reply: Reply) -> str:
    """Which stored edit the question met, and how its overlap stands to τ."""
    why = reply.why
    moved = f"Output moved by {100 * why.contribution:.0f} %." if why.fired and why.contribution else ""
    if why.overlap is None:
        return _match("No edit by itself: every prompt passes the changes." if why.fired else "None.", moved, None)
    met = f"{reply.edit.prompt} → {reply.edit.target}" if reply.edit is not None else "This method cannot tell which."
    verdict = "the edit answers" if why.fired else "the model answers by itself"
    against = "" if why.tau is None else f" {'≥' if why.overlap >= why.tau else '<'} τ {why.tau:.2f}"
    return _match(met, f"{reply.measure.capitalize()} {why.overlap:.2f}{against}: {verdict}. {moved}", reply)


def _match(edit: str, verdict: str, reply: Reply | None) -> str:
    bar = '<div class="mm-meter"></div>'
    if reply is not None and reply.why.tau is not None:
        overlap, tau = reply.why.overlap, reply.why.tau
        scale = max(1.0, 1.1 * overlap, 1.1 * tau)
        bar = (
            f'<div class="mm-meter" role="meter" aria-label="{escape(reply.measure)}, threshold {tau:.2f}" '
            f'aria-valuemin="0" aria-valuemax="{scale:g}" aria-valuenow="{overlap:.3f}">'
            f'<div class="{"mm-fired" if reply.why.fired else ""}" style="width:{100 * max(0, overlap) / scale:.1f}%">'
            f'</div><i style="left:{100 * tau / scale:.1f}%">τ</i></div>'
        )
    return (
        f'<section class="mm-match" aria-label="Matched edit"><h4>Nearest edit</h4>'
        f'<div class="mm-met" title="{escape(edit)}">{escape(edit) or "&nbsp;"}</div>{bar}'
        f'<div class="mm-verdict">{escape(verdict) or "&nbsp;"}</div></section>'
    )


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _visible(token: str) -> str:
    """A token with its blanks to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


CSS = """
.mm-panel { container-type: inline-size; width: 100%; max-width: 1200px; margin: 0 auto; gap: 16px; overflow: visible;
  color: var(--jp-ui-font-color1, #222); --mm-line: var(--jp-border-color2, #ccc);
  --mm-soft: var(--jp-layout-color2, #eee);
  --mm-quiet: color-mix(in srgb, var(--jp-ui-font-color1, #222) 72%, var(--jp-layout-color1, #fff));
  --mm-blue: #0072b2; --mm-bar: #0072b2;
  --mm-orange: #d55e00; --mm-red: #b3261e; }
[data-jp-theme-light="false"] .mm-panel { color-scheme: dark; --mm-bar: #56b4e9; --mm-orange: #e69f00;
  --mm-red: #ff8a80; }
.mm-panel .jupyter-widgets { margin: 0; overflow: visible; }
.mm-panel .widget-html, .mm-panel .widget-html-content { width: 100%; height: auto; line-height: 1.4; }
.mm-panel h2, .mm-panel h3, .mm-panel h4 { margin: 0; font-weight: 600; line-height: 1.3; }
.mm-panel h2 { font-size: 20px; } .mm-panel h3 { font-size: 15px; }
.mm-panel h4 { font-size: 12px; color: var(--mm-quiet); display: flex; gap: 8px; align-items: center; height: 20px; }
.mm-panel .mm-title { display: flex; gap: 12px; align-items: baseline; flex-wrap: wrap; padding: 4px 0; }
.mm-panel .mm-title span, .mm-panel .mm-count, .mm-panel .mm-asked { color: var(--mm-quiet); }
.mm-card { border: 1px solid var(--mm-line); border-radius: 6px; padding: 16px; gap: 12px;
  background: var(--jp-layout-color1, #fff); }
.mm-columns { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.mm-bar { display: flex; flex-flow: row wrap; gap: 8px; align-items: flex-end; }
.mm-panel .widget-text, .mm-panel .widget-dropdown, .mm-panel .widget-combobox { display: flex;
  flex-direction: column; align-items: stretch; width: 100%; height: auto; gap: 4px; }
.mm-panel .mm-bar > .widget-text, .mm-panel .mm-bar > .widget-dropdown { flex: 1 1 160px; width: auto; min-width: 0; }
.mm-panel .widget-label { width: auto; height: auto; line-height: 1.3; text-align: left; margin: 0; font-size: 12px;
  color: var(--mm-quiet); }
.mm-panel .jupyter-widgets input, .mm-panel .jupyter-widgets select { flex: none; height: 32px; width: 100%;
  box-sizing: border-box; border-radius: 4px; }
.mm-panel button { height: 32px; line-height: 30px; min-width: 84px; width: auto; border-radius: 4px; }
.mm-panel button.mod-primary { background: var(--mm-blue); color: #fff; }
.mm-panel :focus-visible { outline: 2px solid var(--mm-bar); outline-offset: 1px; }
.mm-busy button.mod-primary { opacity: .6; transition: opacity .2s .2s; }
.mm-group, .mm-outcome { display: flex; flex-flow: row nowrap; gap: 8px; align-items: flex-start; }
.mm-outcome > .mm-line { flex: 1 1 0; min-width: 0; }
.mm-line { min-height: 34px; max-height: 120px; overflow-y: auto; }
.mm-line, .mm-asked, .mm-verdict, .mm-count { font-size: 13px; }
.mm-line progress { display: block; width: 100%; height: 8px; margin-top: 6px; accent-color: var(--mm-bar); }
.mm-error { color: var(--mm-red); white-space: pre-line; overflow-wrap: anywhere; }
.mm-asked, .mm-met { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.mm-sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px; margin: 8px 0 12px; }
.mm-side { background: var(--mm-soft); border-radius: 4px; padding: 8px 12px; min-width: 0; }
.mm-answer { font-size: 16px; height: 46px; overflow-y: auto; overflow-wrap: anywhere; margin: 4px 0; }
.mm-badge { font-size: 11px; font-weight: 500; padding: 1px 8px; border-radius: 9px; border: 1px solid currentColor; }
.mm-side table { width: 100%; border-collapse: collapse; table-layout: fixed; font-size: 12px; margin: 0; }
.mm-side caption { text-align: left; color: var(--mm-quiet); padding: 0 0 2px; }
.mm-panel .mm-side tr { background: none; } .mm-panel .mm-side td { padding: 1px 0; height: 18px; border: none; }
.mm-panel .mm-token { width: 42%; text-align: left; overflow: hidden; text-overflow: ellipsis; white-space: pre;
  font-family: var(--jp-code-font-family, monospace); }
.mm-panel .mm-percent { width: 56px; text-align: right; font-variant-numeric: tabular-nums; }
.mm-share div { height: 8px; background: var(--mm-bar); border-radius: 2px; min-width: 1px; }
.mm-meter { position: relative; height: 12px; margin: 4px 0 18px; background: var(--mm-soft); border-radius: 3px; }
.mm-meter div { height: 100%; border-radius: 3px; background: var(--mm-quiet); }
.mm-meter div.mm-fired { background: var(--mm-orange); }
.mm-meter i { position: absolute; top: -3px; height: 18px; border-left: 2px solid currentColor; line-height: 48px;
  font-style: normal; font-size: 11px; text-indent: -4px; }
.mm-row { display: flex; flex-flow: row nowrap; gap: 8px; align-items: center; padding: 4px 0; min-height: 32px;
  border-top: 1px solid var(--mm-line); }
.mm-row > .widget-html { flex: 1 1 0; min-width: 0; } .mm-row > button { flex: none; }
.mm-edit { display: flex; gap: 8px; white-space: nowrap; }
.mm-edit span, .mm-edit b { overflow: hidden; text-overflow: ellipsis; min-width: 48px; }
.mm-edit b { flex: none; max-width: 50%; }
.mm-panel .mm-count, .mm-panel .mm-count .widget-html-content { line-height: 32px; width: auto; flex: none; }
.mm-panel .jupyter-widgets select { appearance: auto; background-image: none; }
@container (max-width: 520px) { .mm-row { flex-wrap: wrap; } .mm-row > .widget-html { flex: 1 0 100%; } }
@container (min-width: 760px) { .mm-columns { grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); } }
"""
