/** Small parts of every view: icons, states, notices, dialogs, code to copy. */
import { count } from "./format.js";
import { html, useEffect, useRef, useState } from "./html.js";

/** @import { ApiError } from "./api.js" */
/** @import * as T from "./types.js" */

const LONG_TURN = { letters: 1200, lines: 16 };
const PATHS = {
  check: "M5 12.500l4.500 4.500L19 7.500",
  cross: "M6 6l12 12M18 6L6 18",
  alert:
    "M12 8v5M12 16.500v.01" +
    "M10.300 4.200L2.700 17.500A2 2 0 004.400 20.500h15.200a2 2 0 001.700-3L13.700 4.200a2 2 0 00-3.400 0z",
  info: "M12 11v5M12 8v.01M21 12a9 9 0 11-18 0 9 9 0 0118 0z",
  plus: "M12 5v14M5 12h14",
  upload: "M12 16V4M7 9l5-5 5 5M4 16v3a2 2 0 002 2h12a2 2 0 002-2v-3",
  download: "M12 4v12M7 11l5 5 5-5M4 20h16",
  sun:
    "M12 4V2M12 22v-2M4 12H2M22 12h-2M5.600 5.600L4.200 4.200M19.800 19.800l-1.400-1.400M5.600 18.400l-1.400 1.400" +
    "M19.800 4.200l-1.400 1.400M16 12a4 4 0 11-8 0 4 4 0 018 0z",
  moon: "M20 14.500A8.500 8.500 0 019.500 4 8.500 8.500 0 1020 14.500z",
};

/** @param {{ name: keyof typeof PATHS }} props */
export function Icon({ name }) {
  return html`<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round"
    stroke-linejoin="round" aria-hidden="true" focusable="false">
    <path d=${PATHS[name]} />
  </svg>`;
}

/** @param {{ kind?: string; slim?: boolean; icon?: keyof typeof PATHS; children?: any; busy?: boolean }} props */
export function Button({ kind = "", slim, icon, children, busy, ...rest }) {
  const look = `button ${kind} ${slim ? "slim" : ""}`;
  return html`<button type="button" class=${look} aria-busy=${busy ? "true" : undefined} ...${rest}>
    ${icon && html`<${Icon} name=${icon} />`}${children}
  </button>`;
}

/** @param {{ state: string }} props */
export function State({ state }) {
  return html`<span class="state ${state}">${state}</span>`;
}

/** @param {{ kind?: string; title?: string; children?: any; alert?: boolean }} props */
export function Notice({ kind = "", title, children, alert }) {
  const icon = { bad: "alert", warn: "alert", good: "check" }[kind] || "info";
  return html`<div class="notice ${kind}" role=${alert ? "alert" : undefined}>
    <${Icon} name=${icon} />
    <div>${title && html`<strong>${title}</strong>${children ? html`<br />` : ""}`}${children}</div>
  </div>`;
}

/**
 * What went wrong with a request, and a way to try again.
 * @param {{ error: ApiError | null; again?: () => void }} props
 */
export function Failure({ error, again }) {
  if (!error || error.status === 401) return null;
  const details = error.details || [];
  return html`<${Notice} kind="bad" alert>
    ${error.message}
    ${
      details.length > 0 &&
      html`<ul>
        ${details
          .slice(0, 20)
          .map((d) => html`<li>${d.path ? html`<span class="mono">${d.path}</span>: ` : ""}${d.message}</li>`)}
      </ul>`
    }
    ${
      again &&
      html`
        ${" "}
        <a href="#" onClick=${(event) => {
          event.preventDefault();
          again();
        }}>
          Try again
        </a>
      `
    }
  <//>`;
}

/**
 * Text with code in backticks.
 * @param {{ text: string | null | undefined }} props
 */
export function Words({ text }) {
  return (text || "").split("`").map((part, i) => (i % 2 ? html`<code>${part}</code>` : part));
}

/** @param {{ title: string; children?: any }} props */
export function Empty({ title, children }) {
  return html`<div class="empty"><h2>${title}</h2>${children}</div>`;
}

/** @param {{ lines?: number; height?: number }} props */
export function Loading({ lines = 3, height = 44 }) {
  return html`<div class="stack tight" role="status" aria-label="Loading">
    ${Array.from({ length: lines }, () => html`<div class="ghost" style=${{ height: `${height}px` }}></div>`)}
  </div>`;
}

/** @param {{ value: number; of: number; state?: string; label: string }} props */
export function Meter({ value, of, state = "", label }) {
  const share = of ? Math.min(1, value / of) : 0;
  return html`<div class="meter ${state}" role="progressbar" aria-label=${label} aria-valuemin="0" aria-valuemax=${of}
    aria-valuenow=${value}>
    <span style=${{ width: `${share * 100}%` }}></span>
  </div>`;
}

/**
 * A modal dialog; Escape and the backdrop close it.
 * @param {{ title: string; onClose: () => void; children?: any }} props
 */
export function Dialog({ title, onClose, children }) {
  const box = useRef(/** @type {HTMLDialogElement | null} */ (null));
  useEffect(() => {
    const dialog = box.current;
    dialog?.showModal();
    return () => dialog?.close();
  }, []);
  return html`<dialog ref=${box} aria-label=${title} onCancel=${(e) => {
    e.preventDefault();
    onClose();
  }} onClick=${(e) => e.target === box.current && onClose()}>
    <div class="stack"><h2>${title}</h2>${children}</div>
  </dialog>`;
}

/** @param {string} text */
async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // an address that is not secure has no clipboard
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** @param {{ text: string; label: string; wrap?: boolean }} props */
export function Code({ text, label, wrap }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    try {
      await copyText(text);
      setCopied(true);
      setTimeout(() => setCopied(false), 1600);
    } catch {
      setCopied(false);
    }
  };
  return html`<div class="code ${wrap ? "wrap" : ""}">
    <pre tabindex="0" aria-label=${label}><code>${text}</code></pre>
    <${Button} slim onClick=${copy} aria-label="Copy: ${label}">
      <span aria-live="polite">${copied ? "Copied" : "Copy"}</span>
    <//>
  </div>`;
}

/**
 * Links as tabs: `tabs` is [[name, title, address], …].
 * @param {{ tabs: [string, string, string][]; current: string; label: string }} props
 */
export function Tabs({ tabs, current, label }) {
  const box = useRef(/** @type {HTMLElement | null} */ (null));
  useEffect(() => {
    const nav = box.current;
    const tab = /** @type {HTMLElement | null | undefined} */ (nav?.querySelector("[aria-current]"));
    if (nav && tab) nav.scrollLeft = tab.offsetLeft - nav.offsetLeft - 40;
  }, [current]);
  return html`<nav class="tabs" aria-label=${label} ref=${box}>
    ${tabs.map(
      ([name, title, address]) =>
        html`<a href=${address} aria-current=${name === current ? "page" : undefined}>${title}</a>`,
    )}
  </nav>`;
}

/**
 * Messages of a conversation; of a long one only the beginning, unless `full`.
 * @param {{ messages: T.Message[]; full?: boolean }} props
 */
export function Talk({ messages, full = false }) {
  return html`<div class="talk">
    ${messages.map((turn, i) => html`<${Turn} key=${i} turn=${turn} atFirst=${full} />`)}
  </div>`;
}

/** @param {{ turn: T.Message; atFirst: boolean }} props */
function Turn({ turn, atFirst }) {
  const [full, setFull] = useState(atFirst);
  const text = String(turn.content ?? ""); // null beside tool calls; another type in a line that is not a record
  const long = text.length > LONG_TURN.letters || text.split("\n", LONG_TURN.lines + 1).length > LONG_TURN.lines;
  return html`<div class="turn ${turn.role}">
    <span class="who">${turn.role}</span>
    <div class=${long && !full ? "begun" : ""}>${text}</div>
    ${
      long &&
      !atFirst &&
      html`<${Button} slim kind="quiet" aria-expanded=${full ? "true" : "false"} onClick=${() => setFull(!full)}>
        ${full ? "Show less" : `Show all, ${count(text.length, "character")}`}
      <//>`
    }
  </div>`;
}
