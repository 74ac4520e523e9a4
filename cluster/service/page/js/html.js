/** Preact, its hooks and htm in one place; no other file names the vendored ones. */
import htm from "../vendor/htm.js";
import { h, render } from "../vendor/preact.js";

export { useCallback, useEffect, useMemo, useRef, useState } from "../vendor/preact-hooks.js";
export { render };
export const html = htm.bind(h);
