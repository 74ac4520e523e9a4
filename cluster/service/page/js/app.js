/** The page: the frame around the views, the way between them, the token. Addresses are after the `#`. */
import { ApiError, getToken, setToken } from "./api.js";
import { getCluster, getService } from "./endpoints.js";
import { percent } from "./format.js";
import { useResource, useTheme } from "./hooks.js";
import { html, render, useEffect, useRef, useState } from "./html.js";
import { Button } from "./ui.js";
import { Compare } from "./views/compare.js";
import { NewRun } from "./views/new.js";
import { Run } from "./views/run.js";
import { Runs } from "./views/runs.js";

/**
 * A part of an address; as it is if it is not an encoding of anything.
 * @param {string} part
 */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** @typedef {{ parts: string[]; query: URLSearchParams }} Address */

/** @returns {Address} */
function address() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decoded), query: new URLSearchParams(query || "") };
}

function useAddress() {
  const [at, setAt] = useState(address);
  useEffect(() => {
    const changed = () => setAt(address());
    window.addEventListener("hashchange", changed);
    return () => window.removeEventListener("hashchange", changed);
  }, []);
  return at;
}

/** @param {{ at: Address }} props */
function View({ at }) {
  const [name = "runs", id, tab] = at.parts;
  if (name === "runs" && id) return html`<${Run} key=${id} id=${id} tab=${tab || "curves"} query=${at.query} />`;
  if (name === "runs") return html`<${Runs} />`;
  if (name === "new") return html`<${NewRun} step=${id || "model"} />`;
  if (name === "compare") return html`<${Compare} ids=${(at.query.get("ids") || "").split(",").filter(Boolean)} />`;
  return html`<div class="empty"><h1>Page not found</h1><p><a href="#/runs">All runs</a></p></div>`;
}

function ThemeButton() {
  const theme = useTheme();
  const other = theme === "dark" ? "light" : "dark";
  const choose = () => {
    try {
      localStorage.setItem("rlhf-theme", other);
    } catch {
      document.documentElement.dataset.theme = other;
    }
    document.dispatchEvent(new Event("themechosen"));
  };
  return html`<${Button} kind="quiet icon" icon=${theme === "dark" ? "sun" : "moon"} onClick=${choose}
    aria-label="Switch to ${other} colors" />`;
}

function ClusterMeter() {
  const { data } = useResource(getCluster, [], { poll: 15000 });
  if (!data) return null;
  if (data.state !== "ready")
    return html`<span class="cluster-meter" title=${data.message || ""}>cluster ${data.state}</span>`;
  const kinds = ["CPU", "GPU"].filter((kind) => data.resources[kind]?.total);
  return html`<span class="cluster-meter" aria-label="Cluster use">
    ${kinds.map((kind) => {
      const { used, total } = data.resources[kind];
      return html`<span>${kind} ${percent(used / total)}<span class="total"> of ${total}</span></span>`;
    })}
  </span>`;
}

/** @param {{ onOpen: () => void }} props */
function Gate({ onOpen }) {
  const [token, setText] = useState("");
  const [error, setError] = useState(getToken() ? "The token is invalid or has expired." : "");
  const [busy, setBusy] = useState(false);
  /** @param {Event} event */
  const open = async (event) => {
    event.preventDefault();
    setBusy(true);
    setToken(token.trim());
    try {
      await getService();
      onOpen();
    } catch (problem) {
      const { status, message } = ApiError.of(problem);
      setError(status === 401 ? "Invalid token." : message);
      setBusy(false);
    }
  };
  return html`<form class="gate card stack" onSubmit=${open}>
    <h1>Sign in with a token</h1>
    <p class="muted">
      This server is protected. The person who runs it made the token with <code>rlhf serve --new-token</code>.
    </p>
    <div class="field">
      <label for="token">Token</label>
      <input id="token" type="password" autocomplete="current-password" value=${token}
        onInput=${(e) => setText(e.target.value)} aria-invalid=${error ? "true" : undefined}
        aria-describedby="token-error" autofocus />
      <span id="token-error" class="error" role="alert">${error}</span>
    </div>
    <button class="button primary" disabled=${!token.trim() || busy}>Sign in</button>
    <p class="small muted">The token is kept until this tab is closed.</p>
  </form>`;
}

function App() {
  const at = useAddress();
  const [locked, setLocked] = useState(false);
  const main = useRef(/** @type {HTMLElement | null} */ (null));
  const first = useRef(true);
  useEffect(() => {
    const lock = () => setLocked(true);
    document.addEventListener("unauthorized", lock);
    return () => document.removeEventListener("unauthorized", lock);
  }, []);
  const place = at.parts.join("/");
  useEffect(() => {
    if (first.current) {
      first.current = false;
      return;
    }
    main.current?.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  }, [at.parts.slice(0, 2).join("/")]);
  const here = at.parts[0] || "runs";
  /** @type {(name: string, title: string, to: string) => object} */
  const link = (name, title, to) => html`<a href=${to} aria-current=${here === name ? "page" : undefined}>${title}</a>`;
  return html`
    <a class="skip" href="#main" onClick=${(e) => {
      e.preventDefault();
      main.current?.focus();
    }}>
      Skip to content
    </a>
    <header class="bar">
      <div class="bar-in">
        <a class="brand" href="#/runs" aria-label="rlhf-online, all runs">
          <svg viewBox="0 0 32 32" aria-hidden="true">
            <rect width="32" height="32" rx="8" fill="#0f6b5c" />
            <path d="M6 22c5 0 6-4 9-8s5-5 11-5" fill="none" stroke="#fff" stroke-width="3" stroke-linecap="round" />
            <circle cx="25" cy="9.5" r="2.8" fill="#fff" />
          </svg>
          <span>rlhf-online</span>
        </a>
        <nav aria-label="Main">${link("runs", "Runs", "#/runs")}${link("new", "New run", "#/new")}</nav>
        <div class="end">${!locked && html`<${ClusterMeter} />`}<${ThemeButton} /></div>
      </div>
    </header>
    <main id="main" tabindex="-1" ref=${main} data-place=${place}>
      ${locked ? html`<${Gate} onOpen=${() => setLocked(false)} />` : html`<${View} at=${at} />`}
    </main>
  `;
}

const root = document.getElementById("app");
if (root) {
  root.textContent = "";
  render(html`<${App} />`, root);
}
