// The part of Preact's types that js/html.js uses; without JSX there is no more to check.
export type VNode = object;
export function h(type: unknown, props: object | null, ...children: unknown[]): VNode;
export function render(node: VNode | VNode[], parent: Element): void;
