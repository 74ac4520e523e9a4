// The parameters of handlers in a template are not known: the template is text.
type Handler = (argument: any) => unknown;
type Value = string | number | boolean | object | null | undefined | Handler;

declare const htm: {
  bind<T>(
    make: (type: unknown, props: object | null, ...children: unknown[]) => T,
  ): (strings: TemplateStringsArray, ...values: Value[]) => T;
};
export default htm;
